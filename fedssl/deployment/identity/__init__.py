"""Who is who: the authority, kits, keys, requests, certificates, revocation."""
