"""What was done, done again: a step that failed (`flight`), and a whole run (`whole`)."""
