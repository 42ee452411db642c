"""What a spatial transform is and how to apply it: no data set, no model, no configuration."""
