"""`python -m dsgd_cli` is the same as `dsgd`."""

from dsgd_cli.cli import main

if __name__ == "__main__":
    main()
