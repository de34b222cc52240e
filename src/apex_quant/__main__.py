"""`python -m apex_quant` is the `apex` command."""

from apex_quant.cli import main

main()
