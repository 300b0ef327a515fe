"""python -m infra.local up | status | env | submit [--quiet] -- COMMAND ... | down

The stack's directory is `.local` beside the code, or the one named by D2F_LOCAL_DIR.
"""

import argparse
import sys

from infra.local.processes import StackError
from infra.local.stack import Stack
from infra.local.state import load_state, read_variables, shell_lines, stack_directory
from infra.local.submit import submit


def up(stack: Stack) -> int:
    env = stack.up()
    print("started: " + ", ".join(env.started) if env.started else "already running")
    print(f"environment for your shell: source {stack.directory / 'env'}")
    return 0


def down(stack: Stack) -> int:
    count = stack.down()
    print(f"stopped ({count} processes); data kept in {stack.directory}" if count else "nothing was running")
    return 0


def status(stack: Stack) -> int:
    """Print a line per server; returns 0 when all of them answer."""
    found = stack.status()
    for part in found:
        pids = f"{len(part.pids)} processes from pid {part.pids[0]}" if part.pids else ""
        print(f"{part.name:8} {part.state:10} {part.address:24} {part.memory / 2**20:6.0f} MB   {pids}")
    print(f"directory {stack.directory}, logs in {stack.directory / 'logs'}")
    return 0 if all(part.state == "running" for part in found) else 1


def running_variables(stack: Stack) -> dict[str, str]:
    """Environment variables of the running stack. Raises StackError when the stack was never started."""
    if not load_state(stack.directory).ports or not (stack.directory / "env").is_file():
        raise StackError(f"no stack in {stack.directory}. Start it first: python -m infra.local up")
    return read_variables(stack.directory / "env")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.local", description="The local S3, MLflow and Ray servers.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the servers, or repair them; returns when all answer")
    commands.add_parser("status", help="one line per server; exit code 1 unless all run")
    commands.add_parser("env", help="print the environment as shell lines")
    commands.add_parser("down", help="stop the servers and their jobs; data stay")
    job = commands.add_parser("submit", help="run a command as a Ray job on the current directory's code")
    job.add_argument(
        "--quiet", action="store_true", help="show only how far it is; all its output: DIRECTORY/logs/job.log"
    )
    job.add_argument("argv", nargs="+", metavar="COMMAND", help="after --: -- python -m pipelines.workflow")
    arguments = parser.parse_args(argv)
    stack = Stack(stack_directory(), say=lambda line: print(line, flush=True))
    try:
        if arguments.command == "submit":
            return submit(arguments.argv, running_variables(stack), stack.directory, quiet=arguments.quiet)
        if arguments.command == "env":
            print(shell_lines(running_variables(stack)), end="")
            return 0
        return {"up": up, "down": down, "status": status}[arguments.command](stack)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
