from dps_lens.cli import main

main()
