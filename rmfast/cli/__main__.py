from rmfast.cli import main

main()
