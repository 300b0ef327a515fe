"""The mathematics of Diff2Flow: torch and nothing else.

Read in this order: `schedule` (what the network was trained on), `path` (where it goes), `alignment` (the map between
the two), `loss`, `solver`, `guidance`.
"""
