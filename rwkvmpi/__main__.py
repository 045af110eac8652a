"""`python -m rwkvmpi` is the same program as `rwkvmpi`."""

from rwkvmpi.cli import main

if __name__ == "__main__":
    main()
