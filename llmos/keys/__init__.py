"""Who may come in from the network: secrets, the key file, the server's own key. Files only; sockets and rights are the gateway's."""
