"""`python -m minikin` is `minikin`."""

from minikin.cli.entry import main

main()
