"""Tables in text files: delimited text and JSON, in any encoding, read without guessing at what a caption means."""
