"""`python -m minikin` is `minikin`."""

from minikin.cli.app import main

main()
