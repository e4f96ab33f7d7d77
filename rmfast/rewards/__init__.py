"""What is made of rewards: of the steps of a solution, of several models at once."""
