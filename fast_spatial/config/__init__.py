"""What can be asked for: modes, options, recipes, and the flags they become. Imports neither torch nor numba."""
