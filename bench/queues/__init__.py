"""The queue beside other people's: what is measured, how each is asked, what came out."""
