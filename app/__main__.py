"""Lets `python -m app` be the console command `embedgate`."""

from app.cli import main

if __name__ == "__main__":
    main()
