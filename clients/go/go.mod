module progressdb-kms/clients/go

go 1.22
