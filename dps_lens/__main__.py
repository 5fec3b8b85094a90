"""`python -m dps_lens`, the command line."""

from dps_lens.cli import main

main()
