"""`python -m endlex`: the command line, where its script is not on the path."""

from endlex.cli import main

raise SystemExit(main())
