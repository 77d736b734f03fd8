"""`python -m numbainfer`: the command where the scripts' directory is not on the PATH."""

from numbainfer.cli import main

main()
