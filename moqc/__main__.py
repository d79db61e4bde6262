"""`python -m moqc` is `moqc`."""

from moqc.cli import main

if __name__ == "__main__":
    main()
