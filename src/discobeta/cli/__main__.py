import sys

from discobeta.cli import main

sys.exit(main())
