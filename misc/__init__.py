"""What steps and networks share and that knows no method and no data set."""
