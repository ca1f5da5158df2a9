"""`python -m edge_runtime.cli`: the same as the `edge-runtime` script, for processes that start processes."""

from edge_runtime.cli.main import main

raise SystemExit(main())
