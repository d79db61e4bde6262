"""What an artifact is and why: the report of `moqc inspect`, as data, as HTML and for the terminal."""
