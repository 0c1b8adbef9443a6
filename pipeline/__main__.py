"""`python -m pipeline` is `bd-merge`: what `ray job submit` runs."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
