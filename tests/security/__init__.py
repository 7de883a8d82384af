"""What the package promises about security, as a table, and black-box tests of each line of it."""
