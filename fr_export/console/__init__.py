"""What long work shows while it runs: progress and peak memory of each stage, and no noise of other packages."""
