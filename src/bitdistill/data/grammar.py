"""placeholder"""
def corpus_documents():
    raise NotImplementedError
