"""rmfast inside of the libraries people train and analyse with."""
