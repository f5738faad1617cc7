"""placeholder"""
def write_report(store): pass
