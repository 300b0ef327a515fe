"""Rendered views of procedural objects, with exact geometry. Read solids, categories, cameras, render, rows, table."""
