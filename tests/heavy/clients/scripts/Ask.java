import java.io.BufferedReader;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.util.Base64;

/**
 * Makes calls with the JDK's own client, as langchain4j and Spring AI do: Ask.java URL.
 *
 * A line of its input is a call: "whole", "chunks" or "leave", and the body. What it prints of the first two is the
 * status, the version and the body in Base64; of a call that it leaves "begun" once a line of the answer is there, and
 * "left" once it was told to.
 */
class Ask {
    public static void main(String[] arguments) throws Exception {
        var url = URI.create(arguments[0] + "/v1/chat/completions");
        var client = HttpClient.newHttpClient(); // which would rather have HTTP/2
        var input = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = input.readLine()) != null; ) {
            var call = line.split(" ", 2);
            BodyPublisher body = BodyPublishers.ofString(call[1]);
            if (call[0].equals("chunks")) {
                body = BodyPublishers.fromPublisher(body); // of no known length
            }
            var request = HttpRequest.newBuilder(url).header("Content-Type", "application/json").POST(body).build();
            if (call[0].equals("leave")) {
                InputStream answer = client.send(request, BodyHandlers.ofInputStream()).body();
                answer.read();
                System.out.println("begun");
                input.readLine();
                answer.close();
                System.out.println("left");
                continue;
            }
            var answer = client.send(request, BodyHandlers.ofByteArray());
            var content = Base64.getEncoder().encodeToString(answer.body());
            System.out.println(answer.statusCode() + " " + answer.version() + " " + content);
        }
    }
}
