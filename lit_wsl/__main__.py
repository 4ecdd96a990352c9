"""``python -m lit_wsl`` is the ``lit-wsl`` command."""

from lit_wsl.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
