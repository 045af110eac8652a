"""In which orders emulated threads and blocks run: what is right must be right in all of them."""

ORDERS = (0, 1, 20240229, 271828)  # ascending, descending, two shuffled
