"""Reports of studies: a folder of records, one for each finished run of ``bitdistill sweep``."""
