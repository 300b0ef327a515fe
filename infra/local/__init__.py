"""The embedded stack: SeaweedFS as S3, an MLflow server and a Ray head, all on 127.0.0.1, all in one directory.

`python -m infra.local up | status | env | submit -- COMMAND | down` is the command; `Stack` in `stack.py` is the Python
interface. Nothing outside this package imports it: the pipelines find any S3, MLflow and Ray through the environment.
"""
