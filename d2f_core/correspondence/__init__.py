"""Semantic correspondence: where a point of one image lies in another. Read matching, distillation, multiview, pck."""
