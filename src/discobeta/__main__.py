import sys

from discobeta import warm

status = warm.ask(sys.argv[1:])
if status is None:
    from discobeta.cli import main

    status = main()
sys.exit(status)
