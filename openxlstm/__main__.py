"""`python -m openxlstm` is `xlstm`, for machines whose PATH does not know the command."""

from openxlstm.cli import main

if __name__ == "__main__":
    main(prog_name="xlstm")
