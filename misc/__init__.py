"""What steps and networks share. Nothing here knows a method or a data set."""
