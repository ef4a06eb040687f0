"""`python -m tensorwire`: the command line."""

from tensorwire.cli import main

if __name__ == "__main__":
    main()
