"""Other trainers' descriptions of runs and data sets, read into our settings. One module a format."""
