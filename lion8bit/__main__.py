"""Makes `python -m lion8bit` the command line; the commands themselves are in `lion8bit.cli`."""

from lion8bit.cli import main

if __name__ == "__main__":
    main()
