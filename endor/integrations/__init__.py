"""Endor inside other libraries' interfaces; each module is imported only by those who use that library."""
