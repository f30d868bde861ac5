"""`python -m dpo_studio` is `dpo`."""

from dpo_studio.cli import main

main()
