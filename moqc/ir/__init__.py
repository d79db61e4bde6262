"""The IR: moqc operators on Relax, annotations, sites, the verifier and the text form."""
