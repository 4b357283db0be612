"""`python -m preprocess fetch`: tables of URLs -> stored bytes, before the scan.

    tables     rows of the input files, cut into chunks; one chunk becomes one output file
    client     one URL -> a body that was checked while it came in, or a reason
      addresses   where a connection may lead
      responses   what of a response is believed: opt-out, encoding, size, kind of picture
    captions   URL + caption rows -> webdataset tars      documents   interleaved documents -> Parquet
    conversations   chat records -> JSON lines            spool       bodies that wait for the rows before theirs
    job        chunks, resume, the account, the command

Every row read, and every picture of a document, ends as fetched or as failed with a counted reason.
"""
