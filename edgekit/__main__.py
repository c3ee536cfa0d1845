"""``python -m edgekit`` is the command ``edgekit``. Knows nothing else."""

from edgekit.cli import main

if __name__ == "__main__":
    main()
