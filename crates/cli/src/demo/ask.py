import socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect("/run/keeper.sock")
client.sendall(sys.argv[1].encode())
print(client.recv(256).decode().strip())
