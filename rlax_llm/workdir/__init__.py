"""Whatever a run writes into its folder."""
