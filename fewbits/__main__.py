"""`python -m fewbits` is the command `fewbits`."""

from fewbits.cli.main import main

if __name__ == "__main__":
    main()
