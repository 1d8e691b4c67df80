module progressdb-kms-reference

go 1.21
